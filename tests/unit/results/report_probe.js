// Looks at the finished page and tells the page around it what it found, as JSON.
addEventListener("load", async () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const loaded = (image) => new Promise((done) => {
    image.onload = image.onerror = done;
    image.loading = "eager";
    if (image.complete) done();
  });
  await Promise.all(all("img").map(loaded));
  all("details").forEach((details) => { details.open = true; });
  const numbers = (color) => (color.match(/[\d.]+/g) || []).map(Number);
  const channel = (value) => (value /= 255, value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const contrast = (element) => {
    const pair = [luminance(numbers(getComputedStyle(element).color)), luminance(behind(element))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  const written = all("body *:not(script):not(svg *)").filter((e) =>
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && e.offsetParent !== null);
  const scrolls = all(".scroll").filter((e) => e.scrollWidth > e.clientWidth);
  const found = {
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    width: innerWidth,
    overflow: document.documentElement.scrollWidth > innerWidth,
    images: all("img").length,
    broken_images: all("img").filter((image) => !image.complete || !image.naturalWidth).map((image) => image.alt),
    uncaptioned: all("img").filter((image) => !image.alt || !image.closest("figure")?.querySelector("figcaption")?.textContent.trim()).map((image) => image.alt),
    dead_links: all("a[href^='#']").map((a) => a.getAttribute("href")).filter((h) => !document.getElementById(h.slice(1))),
    low_contrast: written.filter((e) => contrast(e) < 4.5).map((e) => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 40)}`),
    too_small: all("img").filter((image) => image.getBoundingClientRect().width < 250).map((image) => image.alt),
    summary_scrolls: scrolls.some((e) => e.closest("#summary")),
    unreachable: scrolls.filter((e) => e.tabIndex !== 0 || !e.getAttribute("aria-label")).map((e) => e.outerHTML.slice(0, 80)),
  };
  parent.postMessage(JSON.stringify(found), "*");
});

// Lets autograd run on tensors that only claim to be on "cuda:0", on a machine without a GPU: one
// device with one stream, of which nothing is asked. No kernel can run with it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace {
using namespace c10;

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device here() { return Device(DeviceType::CUDA, 0); }
  static Stream only() { return Stream(Stream::DEFAULT, here()); }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const DeviceIndex) const override {}
};

bool has_no_context(const void*, DeviceIndex) { return false; }

// Autograd asks CUDA's hooks whether there is a context, and they refuse a device that is not there.
// So that one entry of their table of virtual functions is replaced. (Itanium ABI: a pointer to a
// virtual member function is its offset in the table plus one.)
void replace_has_primary_context() {
  auto member = &at::AcceleratorHooksInterface::hasPrimaryContext;
  std::intptr_t offset;
  std::memcpy(&offset, &member, sizeof(offset));
  const at::AcceleratorHooksInterface& hooks = at::detail::getCUDAHooks();
  char* table;
  std::memcpy(&table, &hooks, sizeof(table));
  void** entry = reinterpret_cast<void**>(table + offset - 1);
  const auto page = sysconf(_SC_PAGESIZE);
  const auto start = reinterpret_cast<std::uintptr_t>(entry) & ~static_cast<std::uintptr_t>(page - 1);
  mprotect(reinterpret_cast<void*>(start), 2 * page, PROT_READ | PROT_WRITE);
  *entry = reinterpret_cast<void*>(&has_no_context);
}
}  // namespace

extern "C" void install_guard() {
  static Guard guard;
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  replace_has_primary_context();
}

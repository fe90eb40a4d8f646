"""The data sets of the demo, made from images that come with scikit-learn."""

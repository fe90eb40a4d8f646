"""Batches: the order of samples, the loaders, the copy to the device."""

"""Images and labels: readers, data sets, augmentation, loading."""

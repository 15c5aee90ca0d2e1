"""From NIfTI files to batches: BIDS, prepare, the HDF5 store, clips, loader, splits."""

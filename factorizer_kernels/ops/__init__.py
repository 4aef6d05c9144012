"""The operator families, one folder each: windows, nmf, swin_nmf."""

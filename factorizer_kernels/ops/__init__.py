"""The operator families, one folder each. A family may build on those before it: windows, nmf, swin_nmf."""

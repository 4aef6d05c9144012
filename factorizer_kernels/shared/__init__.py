"""What every operator family needs; nothing here names a family."""

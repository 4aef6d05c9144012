"""What all operator families are made with. Nothing here names an operator."""

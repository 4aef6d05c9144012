"""What the commands do: one module each, on a console, with errors that the command line tells."""

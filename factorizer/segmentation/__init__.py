"""From a folder of volumes to a trained network and its label maps. Needs the extra `seg`."""

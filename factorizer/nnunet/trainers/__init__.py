"""What nnU-Net finds, by its own name, in the folder that `nnUNet_extTrainer` names: trainers alone."""

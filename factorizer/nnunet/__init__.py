"""Our networks in nnU-Net's own harness; needs the extra `nnunet`.

`python -m factorizer.nnunet` prints the folder that nnU-Net looks for trainers in, where the variable
`nnUNet_extTrainer` names it:

    export nnUNet_extTrainer=$(python -m factorizer.nnunet)
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerFactorizer
"""

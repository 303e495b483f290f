"""Where numbers go: console, csv, tensorboard, wandb."""

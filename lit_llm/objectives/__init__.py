"""What is minimised: one LightningModule an objective."""

"""Objectives: LightningModules that define what is minimised."""

"""What the commands that generate share: models and shapes as given, their latents, the folder of results."""

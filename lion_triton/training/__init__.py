"""The parts of training: the loop and its stages, what they minimise, and what a run shows for itself."""

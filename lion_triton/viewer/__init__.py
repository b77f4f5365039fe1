"""The parts of ``lion_triton.view``: the page, what lies in files, and what a model makes."""

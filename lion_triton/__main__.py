"""``python -m lion_triton``: what commands there are."""

COMMANDS = {
    "prepare": "make a data set of meshes or clouds",
    "train": "train a model",
    "sample": "generate clouds",
    "evaluate": "score generated clouds",
    "interpolate": "generate what lies between two shapes",
    "vary": "generate variations of a shape; denoise, complete or refine one",
    "mesh": "make watertight meshes of clouds",
    "view": "look at a run or at clouds in a browser",
}


def main() -> None:
    for name, what in COMMANDS.items():
        print(f"python -m lion_triton.{name:<12} {what}")
    print("each has --help")


if __name__ == "__main__":
    main()

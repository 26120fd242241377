"""Data sets that have a short name, and the facts about them."""

# Hub id, centre crop and number of channels of the data sets that have a short name.
NAMED_DATA_SETS = {
    "celeba": {"hub_id": "nielsr/CelebA-faces", "crop": 128, "num_channels": 3},
    "mnist": {"hub_id": "ylecun/mnist", "crop": None, "num_channels": 1},
}


EMBEDDED = ("digits", "rendered-faces")


# Data set -> what it is, its licence, its id on the Hub, whether it shows people (None: not known).
CARD_FACTS = {
    "celeba": (
        "CelebA, aligned photographs of faces, the plain 128-pixel centre crop.",
        "non-commercial research only, without redistribution; the same holds for what this model draws.",
        "nielsr/CelebA-faces",
        True,
    ),
    "mnist": ("MNIST, handwritten digits.", "CC BY-SA 3.0.", "ylecun/mnist", False),
    "digits": ("1,797 handwritten digits of the UCI repository.", "CC BY 4.0.", None, False),
    "rendered-faces": ("Drawings made by `hf_vaeplus` itself, from known factors.", "Apache-2.0.", None, False),
}

"""Is an autoencoder over-regularised, under-regularised or balanced? Measures, the verdict, and how both are shown."""

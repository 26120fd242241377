"""The Hub: uploads, repositories, model cards, data sets of latents."""

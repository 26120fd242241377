"""Images: named data sets, sources, the cache of decoded pixels, the stream, the embedded drawings."""

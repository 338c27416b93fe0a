"""The compiled core: its sources and flags, the cache, the build, the loader, and the doctor."""

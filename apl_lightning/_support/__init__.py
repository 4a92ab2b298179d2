"""Tools that know nothing of refinement: Lightning, processes, random numbers, modes, files, sizes."""

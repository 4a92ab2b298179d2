"""General tools: Lightning, processes, random numbers, modes of networks, files, sizes."""

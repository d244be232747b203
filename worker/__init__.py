"""The machine side: runs jobs where the GPU is; imports only `jobs` and, inside functions, the heavy libraries."""

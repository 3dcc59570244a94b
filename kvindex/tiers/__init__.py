"""What LMCache servers hold in CPU memory, on disk and in object stores, brought into the index."""

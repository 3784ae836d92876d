"""This machine: its folders, the models on its disk, and the memory that its workers have claimed."""

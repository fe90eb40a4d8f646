"""COCO, ADE20K and DAVIS: their files, labels and checks."""

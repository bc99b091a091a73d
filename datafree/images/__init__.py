"""Images from folders, arrays, tars and torchvision, and how they become a network's input."""

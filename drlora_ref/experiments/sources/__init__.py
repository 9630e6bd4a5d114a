"""Where models come from: packages, folders, the hub; and the words of the made-up sets."""

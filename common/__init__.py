"""The ground floor: nouns and ids, what processes say to each other, settings, sizes, rates."""

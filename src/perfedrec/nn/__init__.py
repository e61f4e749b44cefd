"""Building blocks of the models: propagation, losses, feature crossing, graph views and functional optimisers."""

"""How other libraries store quantized matrices in a checkpoint, one library a file: readers by `quant_method`."""

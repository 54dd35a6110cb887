"""Files that the package carries; NOTICE states their sources and licences.

The tiny towers' weights and vocabulary, the models "photos" and "tiny", three example photographs,
and the list of recipes.
"""

"""Files that the package carries; NOTICE states their sources and licences.

The tiny towers' weights and vocabulary, the models "photos" and "tiny", and three example
photographs.
"""

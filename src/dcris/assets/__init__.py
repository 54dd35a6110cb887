"""Files that the package carries; NOTICE states their sources and licences.

The tiny towers' weights and vocabulary, the model "photos", and three example photographs.
"""

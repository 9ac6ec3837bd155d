"""Static pictures of saved runs: figures for print, contact sheets, grids and animations.

Each `write_NAME(run, path)` writes a whole file or none, and returns a line for each thing that it had to leave out. All of
them need matplotlib (extra `plots`), for drawing or for its font. Equal runs give equal bytes.

    paper      what all figures share: their look, the colours, writing them
    lettering  text on pictures
    images     the pictures that a run has kept of its nodes
    layout     where the nodes of a tree stand, and which are left out of a large one
    tree       the tree as a figure                       animation  the way to the answer
    sheet      a contact sheet                            folder     all of it
    grid       images of many runs by prompt, policy, ... series     which runs belong together in a plot
    progress   the best score against what was spent      levels     scores by level
    density    the paths of points over the density of a mixture
"""

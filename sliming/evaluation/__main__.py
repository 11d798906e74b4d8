from sliming.guard import program

program("sliming.evaluation.run")

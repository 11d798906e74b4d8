from sliming.guard import program

program("sliming.smr.build")

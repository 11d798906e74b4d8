from sliming.smr.build import main

main()

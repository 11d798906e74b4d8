from sliming.evaluation.run import main

main()

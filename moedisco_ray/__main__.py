from moedisco_ray.cli.app import main

main()

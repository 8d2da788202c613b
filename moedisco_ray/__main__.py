from moedisco_ray.cli import main

main()

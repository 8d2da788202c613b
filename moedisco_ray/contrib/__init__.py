"""Optional products on top of the training library. Nothing else imports them; `core.registry` names them.

Each folder can be removed together with its lines in the registry.
"""

"""The `gaussian` world: a mixture of Gaussians whose denoiser, transitions and values are closed forms.

`mixture` holds the mathematics (in terms of `gaussians`), `model` the analytic model, `exact` its solver without
discretisation error, `pictures` what samples look like, `verifiers` and `suites` what to search for.
"""

"""The mathematics of influence functions: tensors in, tensors out.

Nothing here knows of files, processes or progress bars. The stages, and what each one reads::

    model, training set ──────────────► grad_z       G (N, D)    one gradient for each training sample
            │                              │
            ├────► curvature ◄ ─ ─ ─ ─ ─ ─ ┤         what a solver prepares once: eigenvalues, dense H, …
            │          │                   │
            ├──────────┼──► s_test         │         S (T, D)    (H + λI)⁻¹ ∇M of each test sample
    test set           │       │           │
                       │       └───────────┼──► influence        scores (T, N) = S Gᵀ / N, rankings, averages
                       │                   │
                       └───────────────────┴──► self_influence   (N,) gᵢᵀ (H + λI)⁻¹ gᵢ / N, where it is asked for

Where it is asked for, ``newton`` is in the place of ``grad_z``: it reads the curvature, too, and its gradients give the
scores of a whole Newton step. ``combined`` averages, or sums, the scores that ``influence`` has of several models.

Solvers that are made of G (``fisher``) prepare of it, and solve with it, in the place of model and training set.
``scores[t, i]`` predicts the measurement of test sample t after training without sample i, minus what it is now:
positive means that it would rise. For a loss, positive is helpful and negative is harmful.
"""

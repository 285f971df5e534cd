"""Settings of the objective."""

from typing import Literal

from pydantic import model_validator

from sd_recipes.recipe.section import Number, Section, setting

ENDS = ("earlier", "later")  # of a model's timesteps


class ObjectiveConfig(Section):
    """Objective: what the UNet learns to predict, and how noise and errors are weighted."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "score"] | None = setting(
        None, "compared", "What the UNet predicts; if not given, what the model's scheduler says."
    )
    rescale_betas_zero_snr: bool = setting(
        False,
        "warned",
        "Let the last timestep be pure noise, in training and in the exported scheduler; not for epsilon and score.",
    )
    snr_gamma: Number | None = setting(None, "warned", "Min-SNR weighting; 5.0 is recommended.", gt=0)
    soft_snr_gamma: Number | None = setting(
        None, "warned", "Min-SNR weighting in its soft form, without a kink; 5.0 is usual.", gt=0, allow_inf_nan=False
    )
    debiased_estimation_loss: bool = setting(False, "warned", "Debiased estimation: the loss of epsilon over √SNR.")
    p2_gamma: Number | None = setting(
        None,
        "warned",
        "P2 weighting: the loss of epsilon over (k + SNR)^γ; 1.0 is recommended.",
        gt=0,
        allow_inf_nan=False,
    )
    p2_k: Number = setting(1.0, "warned", "P2's k.", gt=0, allow_inf_nan=False)
    learned_uncertainty: bool = setting(
        False, "refused", "Divide the loss by its learned size e^u at every timestep, which uncertainty.png shows."
    )
    loss_type: Literal["l2", "huber", "smooth_l1"] = setting(
        "l2",
        "warned",
        "What is averaged over a latent: squared errors, or pseudo-Huber losses, which outliers move less.",
    )
    huber_c: Number = setting(
        0.1, "warned", "Errors beyond this count linearly; with a schedule, its parameter.", gt=0, allow_inf_nan=False
    )
    huber_schedule: Literal["snr", "exponential", "constant"] = setting(
        "snr", "warned", "How Huber's c depends on the timestep."
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = setting(
        "uniform", "warned", "How timesteps are distributed; stratified over the global batch in any case."
    )
    logit_mean: Number = setting(
        0.0, "warned", "Mean of the logit-normal's normal; above 0 draws more noisy ones.", allow_inf_nan=False
    )
    logit_std: Number = setting(
        1.0, "warned", "Standard deviation of the logit-normal's normal.", gt=0, allow_inf_nan=False
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = setting(
        "none",
        "warned",
        "Draw some timesteps more often: the first ones, the last (noisiest) ones, or a range of them.",
    )
    timestep_bias_multiplier: Number = setting(
        1.0, "warned", "How many times as often they are drawn.", gt=0, allow_inf_nan=False
    )
    timestep_bias_portion: Number = setting(
        0.25, "warned", "Which share of all timesteps they are, if they are the earlier or the later ones.", gt=0, le=1
    )
    timestep_bias_begin: int = setting(0, "warned", "Where the range of them begins.", ge=0)
    timestep_bias_end: int = setting(1000, "warned", "Where that range ends, itself not in it.", ge=1)
    min_timestep: int = setting(0, "warned", "The first timestep that is trained.", ge=0)
    max_timestep: int | None = setting(
        None, "warned", "Where the trained timesteps end, itself not among them; if not given, at the last one.", ge=1
    )
    timesteps_by_error: bool = setting(
        False,
        "refused",
        "Draw more timesteps where the running error is large, with weights that keep the loss unbiased.",
    )
    noise_offset: Number = setting(0.0, "warned", "Scale of added noise that is constant over each channel.", ge=0)
    multires_noise_iterations: int = setting(
        0, "warned", "Pyramid noise: levels of coarser noise to add; 6 is usual.", ge=0
    )
    multires_noise_discount: Number = setting(
        0.3, "warned", "Pyramid noise: scale of each level against the one before it.", gt=0, le=1, allow_inf_nan=False
    )
    input_perturbation: Number = setting(0.0, "warned", "Scale of extra noise on the input; 0.1 is recommended.", ge=0)
    dream_training: bool = setting(False, "warned", "DREAM: a second forward pass rectifies noise and target.")
    dream_detail_preservation: Number = setting(1.0, "warned", "DREAM's exponent p.", ge=0)

    @property
    def weightings(self) -> list[str]:
        """Names of the settings that ask for a weight by timestep."""
        names = ("snr_gamma", "soft_snr_gamma", "debiased_estimation_loss", "p2_gamma", "learned_uncertainty")
        return [name for name in names if getattr(self, name)]

    @model_validator(mode="after")
    def objective_agrees(self) -> "ObjectiveConfig":
        if len(self.weightings) > 1:
            raise ValueError(
                f"{' and '.join(f'--{name}' for name in self.weightings)} all say how timesteps are weighted: keep one"
            )
        if self.rescale_betas_zero_snr and self.prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"--rescale_betas_zero_snr makes the last timestep pure noise, of which {self.prediction_type} tells "
                "nothing: use --prediction_type v_prediction, or drop it"
            )
        if self.dream_training and self.prediction_type not in (None, "epsilon"):
            raise ValueError(
                f"--dream_training is defined for the prediction type epsilon, not for {self.prediction_type}: drop one"
            )
        if self.timesteps_by_error and self.timestep_sampling != "uniform":
            raise ValueError(
                f"--timesteps_by_error and --timestep_sampling {self.timestep_sampling} both say which timesteps are "
                "drawn: drop one"
            )
        if self.timestep_bias_strategy != "none" and (self.timesteps_by_error or self.timestep_sampling != "uniform"):
            other = "timesteps_by_error" if self.timesteps_by_error else f"timestep_sampling {self.timestep_sampling}"
            raise ValueError(
                f"--timestep_bias_strategy {self.timestep_bias_strategy} and --{other} both say which timesteps are "
                "drawn: drop one"
            )
        if self.timestep_bias_strategy == "range" and self.timestep_bias_end <= self.timestep_bias_begin:
            raise ValueError(
                f"--timestep_bias_begin {self.timestep_bias_begin} leaves no timestep before --timestep_bias_end "
                f"{self.timestep_bias_end}: lower one or raise the other"
            )
        if self.timesteps_by_error and self.learned_uncertainty:
            raise ValueError(
                "--learned_uncertainty makes the loss alike at all timesteps, so that --timesteps_by_error has nothing "
                "to go by: drop one"
            )
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"--min_timestep {self.min_timestep} leaves no timestep before --max_timestep {self.max_timestep}: "
                "lower one or raise the other"
            )
        for name, needs, is_read in (
            ("p2_k", "--p2_gamma 1", self.p2_gamma is not None),
            ("huber_c", "--loss_type huber", self.loss_type != "l2"),
            ("huber_schedule", "--loss_type huber", self.loss_type != "l2"),
            ("logit_mean", "--timestep_sampling logit_normal", self.timestep_sampling == "logit_normal"),
            ("logit_std", "--timestep_sampling logit_normal", self.timestep_sampling == "logit_normal"),
            ("timestep_bias_multiplier", "--timestep_bias_strategy later", self.timestep_bias_strategy != "none"),
            ("timestep_bias_portion", "--timestep_bias_strategy later", self.timestep_bias_strategy in ENDS),
            ("timestep_bias_begin", "--timestep_bias_strategy range", self.timestep_bias_strategy == "range"),
            ("timestep_bias_end", "--timestep_bias_strategy range", self.timestep_bias_strategy == "range"),
            ("multires_noise_discount", "--multires_noise_iterations 6", self.multires_noise_iterations > 0),
        ):
            value = getattr(self, name)
            if not is_read and value != type(self).model_fields[name].default:
                raise ValueError(f"--{name} {value} is not read without {needs}: add it, or drop --{name}")
        return self

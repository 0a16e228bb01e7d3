"""Somebody's own training loop, made private and robust: the marked lines are all it takes."""

import torch

import defenses
import privacy
import secure_cnn

EPOCHS = 5


def main() -> None:
    data = secure_cnn.load_data("digits")
    model = secure_cnn.build_model("compact", data.spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    threat = defenses.ThreatModel(norm="linf", eps=0.05)
    objective = defenses.AdversarialTraining(threat, method="n-fgsm")  # robust

    plan = privacy.DPPlan(samples=len(data.train), batch_size=240, epochs=EPOCHS)
    plan = plan.calibrate(epsilon=8.0, delta=1e-5)
    private = privacy.attach(plan, model, optimizer, data.train)  # private

    for images, labels in private.batches:
        private.step(objective(private.model, images, labels))

    private.detach()
    found = secure_cnn.evaluate_model(model, data.test, data.spec.classes)
    print(f"epsilon {private.spent():.2f} at delta {plan.delta:g}, accuracy {found.accuracy:.1%}")


if __name__ == "__main__":
    main()

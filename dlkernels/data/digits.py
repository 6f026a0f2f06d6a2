"""Scikit-learn's embedded handwritten digits: 1,797 images of 8x8, pixels 0 to 16. No download."""

import torch

TEST_IMAGES = 360
SPLIT_SEED = 0


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test set, always the same split (1,437 and 360 images).

    Returns ``(train_images, train_labels, test_images, test_labels)``: images float32 (N, 8, 8)
    in 0 to 1, labels int64 (N,). Raises ModuleNotFoundError without scikit-learn.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    # The file is ordered by writer: without a shuffle the test set would be other people's hands.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return images[train], labels[train], images[test], labels[test]

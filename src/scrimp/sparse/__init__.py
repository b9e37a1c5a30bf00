"""What methods of sparse training share: masks, how many weights each layer keeps, scores, drop and growth."""

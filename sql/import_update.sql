-- Replace what the file changes of users that exist. Locks are not touched, so releases go on.
update users
set domain = import_rows.domain,
    labels = import_rows.labels,
    secret = coalesce(import_rows.secret, users.secret)
from pg_temp.import_rows
where import_rows.kind = 'updated'
    and users.id = import_rows.id

-- Users that fit, in whatever state: some for each filter, to see whether a set can ever be had.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
--   $6     which of them few users fit, by their labels  boolean[], as in find_free.sql
--   $7     how many for each  int
select filters.filter, fitting.id
from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[], $6::boolean[])
    with ordinality as filters (user_id, project_id, env, domain, labels, is_rare, filter)
cross join lateral (
    select oldest.id
    from (
        select id
        from users
        where project_id = filters.project_id
            and (filters.env is null or env = filters.env)
            and (filters.domain is null or domain = filters.domain)
            and (filters.labels is null or labels @> filters.labels)
        order by created_at, id
        limit $7::int
    ) as oldest
    where not filters.is_rare
    union all
    select labelled.id
    from (
        select id
        from users
        where project_id = filters.project_id
            and (filters.env is null or env = filters.env)
            and (filters.domain is null or domain = filters.domain)
            and labels @> filters.labels
        offset 0
    ) as labelled
    where filters.is_rare
) as fitting
